-- Whether ARGV[1], an attempt, and ARGV[2], its token, own the record; if not, this is the reply.
if not raw or is_expired then return GONE end
if state == 'W' then return token > tonumber(ARGV[2]) and STALE or GONE end
if attempt ~= ARGV[1] or token ~= tonumber(ARGV[2]) then return STALE end
