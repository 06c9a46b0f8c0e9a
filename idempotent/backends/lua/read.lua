-- The record as it stands: false, or {record, now, milliseconds until Redis drops it}.

local raw = redis.call('GET', KEYS[1])
if not raw then return false end
return {raw, clock(), redis.call('PTTL', KEYS[1])}
