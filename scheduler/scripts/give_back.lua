-- Hand a leased task back, now or later.
-- KEYS[1]  prefix of the namespace
-- ARGV     id, epoch, delay in ms (0: at once), failed (1 counts an attempt; 0 is a hand-back that counts nothing)
-- reply    1, or 0 when the lease is lost
local prefix, id, epoch, delay_ms, failed = KEYS[1], ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4]
local key = prefix .. ':task:' .. id
if redis.call('HGET', key, 'epoch') ~= epoch or redis.call('ZREM', prefix .. ':leased', id) == 0 then
  return 0
end
redis.call('HSET', key, 'deliveries', math.max(0, tonumber(redis.call('HGET', key, 'deliveries')) - 1))
if failed == '1' then
  redis.call('HINCRBY', key, 'attempts', 1)
end
if delay_ms > 0 then
  local time = redis.call('TIME')
  local due_ms = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000) + delay_ms
  redis.call('ZADD', prefix .. ':delayed', due_ms, id)
else
  redis.call('ZADD', prefix .. ':ready:' .. redis.call('HGET', key, 'lane'), redis.call('HGET', key, 'position'), id)
  redis.call('XADD', prefix .. ':wake', 'MAXLEN', '~', 16, '*', 'added', 1)
end
return 1
