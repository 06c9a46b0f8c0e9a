-- on_release. ARGV: attempt, token ('': an unconfirmed claim), unknown ('1', '0'), tombstone. Replies DONE, STALE or GONE.

local releaser, given = ARGV[1], tonumber(ARGV[2])
if is_gone then
  local stands = raw and not is_expired
  local known = stands and attempt == releaser
  if given then
    if known and given == token then return DONE end
    return stands and token > given and STALE or GONE
  end
  if not known then
    store('W', token or 0, now, releaser, fingerprint or '', 0, 0, now + ARGV[4], '')
    wake() -- it may have been woken to make this claim
  end
  return DONE
end
if attempt ~= releaser or (given and given ~= token) or (state ~= 'R' and state ~= 'U') then return STALE end
if ARGV[3] == '0' then
  store('W', token, now, releaser, fingerprint, 0, 0, now + ARGV[4], '')
elseif state == 'R' then
  store('U', token, now, attempt, fingerprint, 0, 0, 0, owner)
end
wake()
return DONE
