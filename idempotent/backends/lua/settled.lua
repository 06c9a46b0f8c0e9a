-- A claim of a settled record is answered before anything else is made ready: making functions would cost it more than
-- all else. Checks what record.lua does; whatever is not plainly so is left to it.
if raw and string.byte(raw, 1) == 209 then
  local state, size = string.byte(raw, 2, 2), string.byte(raw, 27)
  if (state == 67 or state == 70) and (size == 0 or size == 16)
    and #raw > 27 + size + (string.byte(raw, 28 + size) or #raw)
    and (size == 0 or ARGV[2] == '' or string.sub(raw, 28, 43) == ARGV[2])
  then
    local time = redis.call('TIME')
    return {3, time[1] * 1000000 + time[2], raw}
  end
end
