-- The record as it stands: false, or {record, now, milliseconds until Redis drops it}.

if not raw then return false end
return {raw, now, call('PTTL', key)}
