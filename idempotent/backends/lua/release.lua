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
if gone(row, now) then
  if not token then
    local previous = 0
    if row then previous = row.token end
    store(key, now, 'W', previous, now, attempt, '', 0, 0, now + tonumber(ARGV[4]))
  end
  return GONE
end
if row.attempt ~= attempt or (token and token ~= row.token) or row.state == 'C' or row.state == 'F' then return STALE end
if ARGV[3] == '0' then
  redis.call('DEL', key)
elseif row.state == 'R' then
  store(key, now, 'U', row.token, now, row.attempt, row.fingerprint, 0, 0, 0)
end
wake(key)
return DONE
