-- on_settle. ARGV: attempt, token, state ('C', 'F'), ttl in milliseconds, codec, body. Replies DONE, STALE or GONE.

local key = KEYS[1]
local raw = redis.call('GET', key)
if not raw then return GONE end
local row, foreign = parse(raw)
if foreign then return foreign end
local now = clock()
if gone(row, now) then return without(row, now, tonumber(ARGV[2])) end
if row.attempt ~= ARGV[1] or row.token ~= tonumber(ARGV[2]) then return STALE end
if row.state == 'R' or row.state == 'U' then
  local outcome = string.char(#ARGV[5]) .. ARGV[5] .. ARGV[6]
  redis.call('SET', key, head(ARGV[3], row.token, now, row.attempt, row.fingerprint) .. outcome, 'PX', ARGV[4])
  wake(key)
end
return DONE
