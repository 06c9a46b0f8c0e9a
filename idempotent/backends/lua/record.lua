-- Runs in every script: the record under KEYS[1] (see _record.py) and the time. Without tables and functions: making
-- them costs more than all else here. So a script ends early with what is not written, or it leaves in these variables
-- the record that is to be, and its reply in `reply`; then store.lua writes, wake.lua tells, reply.lua replies.
-- Instants and durations: microseconds. A script validates first and writes last, as a failed one is not rolled back.

local call, try, byte, sub = redis.call, redis.pcall, string.byte, string.sub
local HEAD, OPEN, KEPT = '>Bc1I8I8c8Bc0', '>Bc1I8I8c8Bc0I8I8I8Bc0', '>Bc1I8I8c8Bc0I8'
local pack, unpack
if struct then
  pack, unpack = struct.pack, struct.unpack
else -- fakeredis has none
  local function long(n)
    local bytes = ''
    for _ = 1, 8 do
      bytes = string.char(n % 256) .. bytes
      n = math.floor(n / 256)
    end
    return bytes
  end
  local function number(bytes, at)
    local n = 0
    for i = at, at + 7 do n = n * 256 + byte(bytes, i) end
    return n
  end
  function pack(format, magic, state, token, since, attempt, size, fingerprint, lease, lease_until, expires, length, owner)
    local bytes = string.char(magic) .. state .. long(token) .. long(since) .. attempt .. string.char(size) .. fingerprint
    if format == HEAD then return bytes end
    if format == KEPT then return bytes .. long(lease) end
    return bytes .. long(lease) .. long(lease_until) .. long(expires) .. string.char(length) .. owner
  end
  function unpack(format, bytes)
    local size = byte(bytes, 27)
    local magic, state, token, since = byte(bytes, 1), sub(bytes, 2, 2), number(bytes, 3), number(bytes, 11)
    local attempt, fingerprint = sub(bytes, 19, 26), sub(bytes, 28, 27 + size)
    if format == HEAD then return magic, state, token, since, attempt, fingerprint end
    if format == KEPT then return magic, state, token, since, attempt, fingerprint, number(bytes, 28 + size) end
    return magic, state, token, since, attempt, fingerprint,
      number(bytes, 28 + size), number(bytes, 36 + size), number(bytes, 44 + size), sub(bytes, 53 + size)
  end
end

local key = KEYS[1]
local magic, state, token, since, attempt, fingerprint, lease, lease_until, expires, owner, ttl_ends
if raw then
  local size = byte(raw, 27)
  if size == 0 or size == 16 then
    state = sub(raw, 2, 2)
    if state == 'R' or state == 'W' or state == 'U' then
      if #raw == 52 + size + (byte(raw, 52 + size) or 0) then
        magic, state, token, since, attempt, fingerprint, lease, lease_until, expires, owner = unpack(OPEN, raw)
      end
    elseif byte(raw, 1) == 210 then
      if state == 'C' and #raw > 35 + size + (byte(raw, 36 + size) or #raw) then
        magic, state, token, since, attempt, fingerprint, ttl_ends = unpack(KEPT, raw)
        magic, expires = 209, 0
      end
    elseif (state == 'C' or state == 'F') and #raw > 27 + size + (byte(raw, 28 + size) or #raw)
      or state == 'E' and #raw == 27 + size then
      magic, state, token, since, attempt, fingerprint = unpack(HEAD, raw)
      expires = 0
    end
  end
  if magic ~= 209 then return redis.error_reply('FOREIGN the bytes under this key are no record of ours') end
end
local time = call('TIME')
local now = time[1] * 1000000 + time[2]
local is_expired = raw and expires ~= 0 and expires <= now
if ttl_ends and ttl_ends <= now then state, since = 'E', ttl_ends end
local is_gone = not raw or state == 'W' or is_expired
local reply, restarts

local DONE, STALE, GONE = 1, 2, 3
