-- on_forget. ARGV: attempt, force ('1', '0'), tombstone, channel (of those who keep copies of settled records, or ''). Replies as read.lua, with the record that was found.

if not raw then return false end
local left = call('PTTL', key)
if not is_gone and (state ~= 'R' or ARGV[2] == '1') then
  store('W', token, now, ARGV[1], fingerprint, byte(state), 0, now + ARGV[3], '')
  wake()
  if ARGV[4] ~= '' then try('PUBLISH', ARGV[4], '') end
end
return {raw, now, left}
