-- on_forget. ARGV: attempt, force ('1', '0'), tombstone. Replies as read.lua, with the record that was found.

local key = KEYS[1]
local raw = redis.call('GET', key)
if not raw then return false end
local row, foreign = parse(raw)
if foreign then return foreign end
local now = clock()
local left = redis.call('PTTL', key)
if not gone(row, now) and (row.state ~= 'R' or ARGV[2] == '1') then
  store(key, now, 'W', row.token, now, ARGV[1], row.fingerprint, string.byte(row.state), 0, now + tonumber(ARGV[3]), '')
  wake(key)
end
return {raw, now, left}
