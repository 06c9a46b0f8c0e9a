-- Stand in line for a lock that is held. ARGV: token, turn (who waits), place ('': at the end of the line).
-- Replies the place, by which the line is ordered; false: the lock is not held under that token any more.

local key, line = KEYS[1], KEYS[2]
local raw = call('GET', key)
if not raw then return false end
local row, foreign = parse(raw)
if foreign then return foreign end
local now = clock()
if row.state ~= 'R' or row.token ~= tonumber(ARGV[1]) or row.lease_until <= now then return false end
local place = tonumber(ARGV[3]) or now
call('ZADD', line, string.format('%d', place), ARGV[2])
call('PEXPIRE', line, string.format('%d', math.ceil((row.lease_until - now) / 1000) + 60000))
return place
