-- Shared by every script: the record's envelope (see _record.py) and the clock. Instants and durations: microseconds.
-- A script validates first and writes last, as a failed one is not rolled back.

local call, byte, sub = redis.call, string.byte, string.sub
local pack3, unpack3, head
if struct then
  local pack, unpack = struct.pack, struct.unpack
  function pack3(a, b, c) return pack('>I8I8I8', a, b, c) end
  function unpack3(raw, at) return unpack('>I8I8I8', raw, at) end
  function head(state, token, since, attempt, fingerprint)
    return pack('>Bc1I8I8c8Bc0', 209, state, token, since, attempt, #fingerprint, fingerprint)
  end
else -- fakeredis has none
  local function pack1(n)
    local bytes = ''
    for _ = 1, 8 do
      bytes = string.char(n % 256) .. bytes
      n = math.floor(n / 256)
    end
    return bytes
  end
  local function unpack1(raw, at)
    local n = 0
    for i = at, at + 7 do n = n * 256 + byte(raw, i) end
    return n
  end
  function pack3(a, b, c) return pack1(a) .. pack1(b) .. pack1(c) end
  function unpack3(raw, at) return unpack1(raw, at), unpack1(raw, at + 8), unpack1(raw, at + 16) end
  function head(state, token, since, attempt, fingerprint)
    return '\209' .. state .. pack1(token) .. pack1(since) .. attempt .. string.char(#fingerprint) .. fingerprint
  end
end

local function clock()
  local time = call('TIME')
  return time[1] * 1000000 + time[2]
end

-- The record in `raw`; nil and an error reply for bytes that are none of ours.
local function parse(raw)
  local size, state = byte(raw, 27), sub(raw, 2, 2)
  if size and byte(raw, 1) == 209 and (size == 0 or size == 16) then
    local is_open = state == 'R' or state == 'U' or state == 'W'
    if is_open and #raw == 52 + size + (byte(raw, 52 + size) or 0) then
      local lease, lease_until, expires = unpack3(raw, 28 + size)
      local token, since = unpack3(raw, 3)
      return {
        state = state, token = token, since = since, attempt = sub(raw, 19, 26), fingerprint = sub(raw, 28, 27 + size),
        lease = lease, lease_until = lease_until, expires = expires, owner = sub(raw, 53 + size),
      }
    elseif (state == 'C' or state == 'F') and #raw > 27 + size + (byte(raw, 28 + size) or #raw) then
      local token, since = unpack3(raw, 3)
      return {
        state = state, token = token, since = since, attempt = sub(raw, 19, 26), fingerprint = sub(raw, 28, 27 + size),
        expires = 0,
      }
    end
  end
  return nil, redis.error_reply('FOREIGN the bytes under this key are no record of ours')
end

-- Store a running, unknown or withdrawn record; `expires` 0: it stays until it is settled.
local function store(key, now, state, token, since, attempt, fingerprint, lease, lease_until, expires, owner)
  local raw = head(state, token, since, attempt, fingerprint)
    .. pack3(lease, lease_until, expires) .. string.char(#owner) .. owner
  if expires == 0 then
    call('SET', key, raw)
  else
    call('SET', key, raw, 'PX', string.format('%d', math.max(1, math.ceil((expires - now) / 1000))))
  end
end

-- Restart the lease of `row` from now on; its retention moves along.
local function hold(key, now, row, state, since, lease)
  local expires = row.expires
  if expires ~= 0 and row.lease_until ~= 0 then
    expires = now + lease + math.max(0, expires - row.lease_until)
  end
  store(key, now, state, row.token, since, row.attempt, row.fingerprint, lease, now + lease, expires, row.owner)
end

local function expired(row, now)
  return row.expires ~= 0 and row.expires <= now
end

local function gone(row, now)
  return row == nil or row.state == 'W' or expired(row, now)
end

-- Tell those who wait: of the line for a lock, KEYS[2], the first who still listens, else everybody.
local function wake(key)
  local first = KEYS[2] and redis.pcall('ZPOPMIN', KEYS[2])
  while first and first[1] do
    local heard = redis.pcall('PUBLISH', key .. '#' .. first[1], '')
    if type(heard) == 'number' and heard > 0 then return end
    first = redis.pcall('ZPOPMIN', KEYS[2])
  end
  redis.pcall('PUBLISH', key, '')
end

local DONE, STALE, GONE = 1, 2, 3

-- The answer to the owner of `token` where there is no record: a tombstone may tell that it was overtaken.
local function without(row, now, token)
  if row and token and row.token > token and not expired(row, now) then return STALE end
  return GONE
end
