-- on_release. ARGV: attempt, token ('': an unconfirmed claim), tombstone; where it is to become unknown '1'.
-- Replies DONE, STALE or GONE.

local releaser, given = ARGV[1], tonumber(ARGV[2])
if is_gone then
  local stands = raw and not is_expired
  local known = stands and attempt == releaser
  if given then
    if known and given == token then return DONE end
    return stands and token > given and STALE or GONE
  end
  if known then return DONE end
  -- Waiters are told as well: the releaser may have been woken to make this claim.
  token, fingerprint = token or 0, fingerprint or ''
elseif attempt ~= releaser or (given and given ~= token) or (state ~= 'R' and state ~= 'U') then
  return STALE
end
if is_gone or not ARGV[4] then
  state, since, expires, owner = 'W', now, now + ARGV[3], ''
else
  if state == 'R' then since = now end
  state, expires = 'U', 0
end
attempt, lease, lease_until, reply = releaser, 0, 0, DONE
