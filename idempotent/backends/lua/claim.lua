-- on_claim. ARGV: attempt, fingerprint, terms ('lease,keep,takeover,owner': keep '' is until it is settled, takeover '1'
-- or '0'); where there is one of them, over ('': none), turn (who stood in line for the lock and leaves it now; '': nobody).
-- Each argument costs a replay as much as a look at the record.
-- Replies the token; for a settled record 'seconds microseconds record', with the time; or {1, token, took over}
-- {2, token, lease left}  {4, token, age}  {5, age, fingerprint}  {6, token, age}

local GRANTED, BUSY, UNKNOWN, MISMATCHED, EXPIRED = 1, 2, 4, 5, 6
local asker, asked, over, turn = ARGV[1], ARGV[2], tonumber(ARGV[4] or ''), ARGV[5] or ''
local span, keep, takeover, holder = string.match(ARGV[3], '^(%d+),(%d*),(%d),(.*)$')
if turn ~= '' then try('ZREM', KEYS[2], turn) end

local left = 0
if is_gone then
  if raw and not is_expired and attempt == asker then return {BUSY, token, 0} end
else
  if asked ~= '' and fingerprint ~= '' and asked ~= fingerprint then
    return {MISMATCHED, math.max(0, now - since), fingerprint}
  end
  if state == 'R' then
    if attempt == asker then return token end
    left = lease_until - now
    if left > 0 and left <= lease then return {BUSY, token, left} end
  elseif state == 'U' then
    if over ~= token then return {UNKNOWN, token, math.max(0, now - since)} end
  elseif state == 'E' then
    if ttl_ends then
      call('SET', key, pack(HEAD, 209, 'E', token, since, attempt, #fingerprint, fingerprint), 'KEEPTTL')
    end
    return {EXPIRED, token, math.max(0, now - since)}
  else
    return time[1] .. ' ' .. time[2] .. ' ' .. raw
  end
end

if left > 0 then -- the clock went back: whoever runs has its whole lease from now on
  restarts, reply = true, {BUSY, token, lease}
elseif state == 'R' and not is_gone and takeover == '0' and over ~= token then
  state, since, lease, lease_until, expires, reply = 'U', now, 0, 0, 0, {UNKNOWN, token, 0}
else
  local granted = now
  if token and token >= now then granted = token + 1 end
  reply = granted
  if not is_gone then
    reply = {GRANTED, granted, 1}
    if asked == '' then asked = fingerprint end
  end
  lease, lease_until, expires = tonumber(span), now + span, 0
  if keep ~= '' then expires = lease_until + keep end
  state, token, since, attempt, fingerprint, owner = 'R', granted, now, asker, asked, holder
end
