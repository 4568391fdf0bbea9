-- Hand a leased task back, now or later.
-- include: turns
-- KEYS[1]  prefix of the namespace
-- ARGV     id, epoch, delay in ms (0: at once), failed (1 counts an attempt; 0 is a hand-back that counts nothing)
-- reply    1, or 0 when the lease is lost
local id, epoch, delay_ms, failed = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4]
local key = task_key(id)
if redis.call('HGET', key, 'epoch') ~= epoch or redis.call('ZREM', leased, id) == 0 then
  return 0
end
redis.call('HSET', key, 'deliveries', math.max(0, tonumber(redis.call('HGET', key, 'deliveries')) - 1))
if failed == '1' then
  redis.call('HINCRBY', key, 'attempts', 1)
end
if delay_ms > 0 then
  redis.call('ZADD', delayed, now_ms + delay_ms, id)
else
  make_ready(id)
  wake(1)
end
return 1
