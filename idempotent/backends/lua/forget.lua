-- on_forget. ARGV: attempt, force ('1', '0'), tombstone, channel (of those who keep copies of settled records, or '').
-- Replies as read.lua, with the record that was found; and with 1 where those who keep copies could not be told.

if not raw then return false end
reply = {raw, now, call('PTTL', key)}
if is_gone or state == 'R' and ARGV[2] ~= '1' then return reply end
if ARGV[4] ~= '' and type(try('PUBLISH', ARGV[4], '')) == 'table' then reply[4] = 1 end
lease, state, since, attempt, lease_until, expires, owner = byte(state), 'W', now, ARGV[1], 0, now + ARGV[3], ''
