-- Write the record, running, unknown or withdrawn; `expires` 0: it stays until it is settled. With `restarts` its lease
-- begins anew, and its retention moves along.

if restarts then
  if expires ~= 0 and lease_until ~= 0 then expires = now + lease + math.max(0, expires - lease_until) end
  lease_until = now + lease
end
local written = pack(
  OPEN, 209, state, token, since, attempt, #fingerprint, fingerprint, lease, lease_until, expires, #owner, owner
)
if expires == 0 then
  call('SET', key, written)
else
  call('SET', key, written, 'PX', string.format('%d', math.ceil((expires - now) / 1000)))
end
