-- on_renew. ARGV: attempt, token, lease. Replies DONE, STALE or GONE.

if state == 'U' then
  since = now
elseif state ~= 'R' then
  return STALE
end
state, lease, restarts, reply = 'R', tonumber(ARGV[3]), true, DONE
