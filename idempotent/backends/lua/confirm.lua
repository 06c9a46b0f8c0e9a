-- Write the record once more as it is, so that a WAIT behind this covers it, whoever wrote it, and over which connection.
-- Replies {state, token}; false: there is none.

if not raw or is_expired then return false end
call('SET', key, raw, 'KEEPTTL')
return {state, token}
