-- Tell those who wait: of the line for a lock, KEYS[2], the first who still listens; for a call everybody.
local function wake()
  if not KEYS[2] then return try('PUBLISH', key, '') end
  local first = try('ZPOPMIN', KEYS[2])
  while first[1] do
    local heard = try('PUBLISH', key .. '#' .. first[1], '')
    if type(heard) == 'number' and heard > 0 then return end
    first = try('ZPOPMIN', KEYS[2])
  end
end
