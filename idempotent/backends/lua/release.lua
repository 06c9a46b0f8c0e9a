-- on_release. ARGV: attempt, token ('': an unconfirmed claim), unknown ('1', '0'), tombstone. Replies DONE, STALE or GONE.

local key = KEYS[1]
local attempt, token = ARGV[1], tonumber(ARGV[2])
local raw = redis.call('GET', key)
local row, foreign
if raw then
  row, foreign = parse(raw)
  if foreign then return foreign end
end
local now = clock()
local tombstone = now + tonumber(ARGV[4])
if gone(row, now) then
  local known = row and row.state == 'W' and not expired(row, now) and row.attempt == attempt
  if known and token == row.token then return DONE end
  if token then return without(row, now, token) end
  if not known then
    local previous, fingerprint = 0, ''
    if row then previous, fingerprint = row.token, row.fingerprint end
    store(key, now, 'W', previous, now, attempt, fingerprint, 0, 0, tombstone, '')
  end
  return DONE
end
if row.attempt ~= attempt or (token and token ~= row.token) or row.state == 'C' or row.state == 'F' then return STALE end
if ARGV[3] == '0' then
  store(key, now, 'W', row.token, now, attempt, row.fingerprint, 0, 0, tombstone, '')
elseif row.state == 'R' then
  store(key, now, 'U', row.token, now, row.attempt, row.fingerprint, 0, 0, 0, row.owner)
end
wake(key)
return DONE
