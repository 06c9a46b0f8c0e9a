-- on_renew. ARGV: attempt, token, lease. Replies DONE, STALE or GONE.

if state == 'R' then
  hold(since, tonumber(ARGV[3]))
elseif state == 'U' then
  hold(now, tonumber(ARGV[3]))
else
  return STALE
end
return DONE
