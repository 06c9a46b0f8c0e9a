-- Stand in line for a lock that is held. ARGV: token, turn (who waits), place ('': at the end of the line).
-- Replies the place, by which the line is ordered; false: the lock is not held under that token any more.

if state ~= 'R' or token ~= tonumber(ARGV[1]) or lease_until <= now then return false end
local line, place = KEYS[2], tonumber(ARGV[3]) or now
call('ZADD', line, string.format('%d', place), ARGV[2])
call('PEXPIRE', line, string.format('%d', math.ceil((lease_until - now) / 1000) + 60000))
return place
