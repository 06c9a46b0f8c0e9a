-- Restart the lease of the record from now on; its retention moves along.
local function hold(since, lease)
  local later = expires
  if later ~= 0 and lease_until ~= 0 then later = now + lease + math.max(0, later - lease_until) end
  store('R', token, since, attempt, fingerprint, lease, now + lease, later, owner)
end
