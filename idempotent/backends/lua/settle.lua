-- on_settle. ARGV: attempt, token, state ('C', 'F'), ttl in milliseconds, codec, body. Replies DONE, STALE or GONE.

if state == 'R' or state == 'U' then
  local outcome = string.char(#ARGV[5]) .. ARGV[5] .. ARGV[6]
  call('SET', key, pack(HEAD, 209, ARGV[3], token, now, attempt, #fingerprint, fingerprint) .. outcome, 'PX', ARGV[4])
  wake()
end
return DONE
