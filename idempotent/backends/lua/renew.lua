-- on_renew. ARGV: attempt, token, lease. Replies DONE, STALE or GONE.

local key = KEYS[1]
local raw = redis.call('GET', key)
if not raw then return GONE end
local row, foreign = parse(raw)
if foreign then return foreign end
local now = clock()
if gone(row, now) then return without(row, now, tonumber(ARGV[2])) end
if row.attempt ~= ARGV[1] or row.token ~= tonumber(ARGV[2]) then return STALE end
if row.state == 'R' then
  hold(key, now, row, 'R', row.since, tonumber(ARGV[3]))
elseif row.state == 'U' then
  hold(key, now, row, 'R', now, tonumber(ARGV[3]))
else
  return STALE
end
return DONE
