-- A claim of a settled record is answered before anything else is made ready. Whatever is not plainly so is left to
-- record.lua; how long the codec's name is, the claimer looks at itself.
if raw then
  local byte = string.byte
  local magic, state = byte(raw, 1, 2)
  if magic == 209 and (state == 67 or state == 70) then
    local size = byte(raw, 27)
    if size == 0 or size == 16 and (ARGV[2] == '' or string.sub(raw, 28, 43) == ARGV[2]) then
      local time = redis.call('TIME')
      return time[1] .. ' ' .. time[2] .. ' ' .. raw
    end
  end
end
