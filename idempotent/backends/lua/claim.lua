-- on_claim. ARGV: attempt, fingerprint, terms ('lease,keep,takeover': keep '' is until it is settled, takeover '1' or '0');
-- where there is any of them, over ('': none), owner, turn (who stood in line for the lock and leaves it now; '': nobody).
-- Each argument costs a replay as much as a look at the record.
-- Replies the token; or {1, token, took over}  {2, token, lease left}  {3, now, record}  {4, token, age}
-- {5, age, fingerprint}  {6, token, age}

local GRANTED, BUSY, SETTLED, UNKNOWN, MISMATCHED, EXPIRED = 1, 2, 3, 4, 5, 6
local asker, asked, over, turn = ARGV[1], ARGV[2], tonumber(ARGV[4] or ''), ARGV[6] or ''
local span, keep, takeover = string.match(ARGV[3], '^(%d+),(%d*),(%d)$')
if turn ~= '' then try('ZREM', KEYS[2], turn) end

local took_over = false
if is_gone then
  if raw and not is_expired and attempt == asker then return {BUSY, token, 0} end
else
  if asked ~= '' and fingerprint ~= '' and asked ~= fingerprint then
    return {MISMATCHED, math.max(0, now - since), fingerprint}
  end
  if state == 'R' then
    if attempt == asker then return token end
    local left = lease_until - now
    if left > lease then
      hold(since, lease)
      return {BUSY, token, lease}
    end
    if left > 0 then return {BUSY, token, left} end
    if takeover == '0' and over ~= token then
      store('U', token, now, attempt, fingerprint, 0, 0, 0, owner)
      return {UNKNOWN, token, 0}
    end
  elseif state == 'U' then
    if over ~= token then return {UNKNOWN, token, math.max(0, now - since)} end
  elseif state == 'E' then
    if ttl_ends then
      call('SET', key, pack(HEAD, 209, 'E', token, since, attempt, #fingerprint, fingerprint), 'KEEPTTL')
    end
    return {EXPIRED, token, math.max(0, now - since)}
  else
    return {SETTLED, now, raw}
  end
  took_over = true
  if asked == '' then asked = fingerprint end
end

local granted, until_then, gone_at = now, now + span, 0
if token and token >= now then granted = token + 1 end
if keep ~= '' then gone_at = until_then + keep end
store('R', granted, now, asker, asked, tonumber(span), until_then, gone_at, ARGV[5] or '')
if took_over then return {GRANTED, granted, 1} end
return granted
