-- on_claim. ARGV: attempt, fingerprint, lease, keep ('': until it is settled), takeover ('1', '0'), over ('': none),
-- owner, turn (who stood in line for the lock and leaves it now; '': nobody).
-- Replies: {1, token, took over}  {2, token, lease left}  {3, now, record}  {4, token, age}  {5, age, fingerprint}

local GRANTED, BUSY, SETTLED, UNKNOWN, MISMATCHED = 1, 2, 3, 4, 5
local key = KEYS[1]
local attempt, fingerprint, lease, keep = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local takeover, over, owner = ARGV[5] == '1', tonumber(ARGV[6]), ARGV[7]
local raw = redis.call('GET', key)
local row, foreign
if raw then
  row, foreign = parse(raw)
  if foreign then return foreign end
end
local now = clock()
if ARGV[8] ~= '' then redis.pcall('ZREM', KEYS[2], ARGV[8]) end

local function grant(took_over)
  local token = now
  if row then token = math.max(row.token + 1, now) end
  if took_over == 1 and fingerprint == '' then fingerprint = row.fingerprint end
  local expires = 0
  if keep then expires = now + lease + keep end
  store(key, now, 'R', token, now, attempt, fingerprint, lease, now + lease, expires, owner)
  return {GRANTED, token, took_over}
end

if not row or expired(row, now) then return grant(0) end
if row.state == 'W' then
  if row.attempt == attempt then return {BUSY, row.token, 0} end
  return grant(0)
end
local age = math.max(0, now - row.since)
if fingerprint ~= '' and row.fingerprint ~= '' and fingerprint ~= row.fingerprint then
  return {MISMATCHED, age, row.fingerprint}
end
if row.state == 'R' then
  if row.attempt == attempt then return {GRANTED, row.token, 0} end
  local left = row.lease_until - now
  if left > row.lease then
    hold(key, now, row, 'R', row.since, row.lease)
    return {BUSY, row.token, row.lease}
  end
  if left > 0 then return {BUSY, row.token, left} end
  if takeover or over == row.token then return grant(1) end
  store(key, now, 'U', row.token, now, row.attempt, row.fingerprint, 0, 0, 0, row.owner)
  return {UNKNOWN, row.token, 0}
end
if row.state == 'U' then
  if over == row.token then return grant(1) end
  return {UNKNOWN, row.token, age}
end
return {SETTLED, now, raw}
