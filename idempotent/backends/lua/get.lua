-- Runs first in every script: the bytes under KEYS[1].
local raw = redis.call('GET', KEYS[1])
