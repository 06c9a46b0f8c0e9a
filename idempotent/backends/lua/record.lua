-- Shared by every script: the record's envelope (see _record.py) and the clock. Instants and durations: microseconds.
-- A script validates first and writes last, as a failed one is not rolled back.

local function pack8(n)
  local h = n % 256; n = (n - h) / 256
  local g = n % 256; n = (n - g) / 256
  local f = n % 256; n = (n - f) / 256
  local e = n % 256; n = (n - e) / 256
  local d = n % 256; n = (n - d) / 256
  local c = n % 256; n = (n - c) / 256
  local b = n % 256
  return string.char((n - b) / 256, b, c, d, e, f, g, h)
end

local function unpack8(s, at)
  local a, b, c, d, e, f, g, h = string.byte(s, at, at + 7)
  return ((((((a * 256 + b) * 256 + c) * 256 + d) * 256 + e) * 256 + f) * 256 + g) * 256 + h
end

local function clock()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000000 + tonumber(time[2])
end

-- The record in `raw`; nil and an error reply for bytes that are none of ours.
local function parse(raw)
  local size = string.byte(raw, 27)
  local state = string.sub(raw, 2, 2)
  if size and string.byte(raw, 1) == 209 and (size == 0 or size == 16) then
    local row = {
      raw = raw,
      state = state,
      token = unpack8(raw, 3),
      attempt = string.sub(raw, 19, 26),
      fingerprint = string.sub(raw, 28, 27 + size),
    }
    if state == 'R' or state == 'U' or state == 'W' then
      if #raw == 52 + size + (string.byte(raw, 52 + size) or 0) then
        row.since = unpack8(raw, 11)
        row.lease = unpack8(raw, 28 + size)
        row.lease_until = unpack8(raw, 36 + size)
        row.expires = unpack8(raw, 44 + size)
        row.owner = string.sub(raw, 53 + size)
        return row
      end
    elseif (state == 'C' or state == 'F') and #raw > 27 + size + (string.byte(raw, 28 + size) or #raw) then
      row.since = unpack8(raw, 11)
      row.expires = 0
      return row
    end
  end
  return nil, redis.error_reply('FOREIGN the bytes under this key are no record of ours')
end

local function head(state, token, since, attempt, fingerprint)
  return '\209' .. state .. pack8(token) .. pack8(since) .. attempt .. string.char(#fingerprint) .. fingerprint
end

-- Store a running, unknown or withdrawn record; `expires` 0: it stays until it is settled.
local function store(key, now, state, token, since, attempt, fingerprint, lease, lease_until, expires, owner)
  local raw = head(state, token, since, attempt, fingerprint)
    .. pack8(lease) .. pack8(lease_until) .. pack8(expires) .. string.char(#owner) .. owner
  if expires == 0 then
    redis.call('SET', key, raw)
  else
    redis.call('SET', key, raw, 'PX', string.format('%d', math.max(1, math.ceil((expires - now) / 1000))))
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

local function wake(key)
  redis.pcall('PUBLISH', key, '')
end

local DONE, STALE, GONE = 1, 2, 3

-- The answer to the owner of `token` where there is no record: a tombstone may tell that it was overtaken.
local function without(row, now, token)
  if row and token and row.token > token and not expired(row, now) then return STALE end
  return GONE
end
