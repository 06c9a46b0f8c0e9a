-- Tell those who wait: of the line for a lock, KEYS[2], the first who still listens; for a call everybody.

if KEYS[2] then
  local first = try('ZPOPMIN', KEYS[2])
  while first[1] do
    local heard = try('PUBLISH', key .. '#' .. first[1], '')
    if type(heard) == 'number' and heard > 0 then break end
    first = try('ZPOPMIN', KEYS[2])
  end
else
  try('PUBLISH', key, '')
end
