-- on_settle. ARGV: attempt, token, state ('C', 'F'), ttl in milliseconds, codec, body; where the key is remembered for
-- how many milliseconds more. Replies DONE, STALE or GONE.

if state == 'R' or state == 'U' then
  local outcome = string.char(#ARGV[5]) .. ARGV[5] .. ARGV[6]
  local head, ends = nil, ARGV[4]
  if ARGV[7] then
    head = pack(KEPT, 210, ARGV[3], token, now, attempt, #fingerprint, fingerprint, now + ends * 1000)
    ends = string.format('%d', ends + ARGV[7])
  else
    head = pack(HEAD, 209, ARGV[3], token, now, attempt, #fingerprint, fingerprint)
  end
  call('SET', key, head .. outcome, 'PX', ends)
  wake()
end
return DONE
