-- on_settle. ARGV: attempt, token, state ('C', 'F'), ttl in milliseconds, codec, body; where the key is remembered for
-- how many milliseconds more. Replies DONE, STALE or GONE.

if state ~= 'R' and state ~= 'U' then return DONE end
local head, ends
if ARGV[7] then
  head = pack(KEPT, 210, ARGV[3], token, now, attempt, #fingerprint, fingerprint, now + ARGV[4] * 1000)
  ends = string.format('%d', ARGV[4] + ARGV[7])
else
  head, ends = pack(HEAD, 209, ARGV[3], token, now, attempt, #fingerprint, fingerprint), ARGV[4]
end
call('SET', key, head .. string.char(#ARGV[5]) .. ARGV[5] .. ARGV[6], 'PX', ends)
reply = DONE
