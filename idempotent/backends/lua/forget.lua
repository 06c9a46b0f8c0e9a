-- Remove the record. ARGV: force ('1', '0'). Replies as read.lua, with the record that was found.

local key = KEYS[1]
local raw = redis.call('GET', key)
if not raw then return false end
local row, foreign = parse(raw)
if foreign then return foreign end
local now = clock()
local left = redis.call('PTTL', key)
if not gone(row, now) and (row.state ~= 'R' or ARGV[1] == '1') then
  redis.call('DEL', key)
  wake(key)
end
return {raw, now, left}
