-- Leave the line for a lock without having asked for it. ARGV: turn (who waited).
-- Its wake-up may have been the one that came, so the next in line is told if the lock is free.

call('ZREM', KEYS[2], ARGV[1])
if state == 'R' then return DONE end
reply = DONE
