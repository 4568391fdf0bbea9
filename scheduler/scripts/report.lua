-- A worker says that it lives and what it has done; who has been silent for long is forgotten.
-- include: turns
-- KEYS[1]  prefix of the namespace
-- ARGV     owner, its record (JSON; empty: it ends), silence in ms after which others are forgotten
local workers, seen = prefix .. ':workers', prefix .. ':seen'
also_when_full()
if ARGV[2] == '' then
  redis.call('HDEL', workers, ARGV[1])
  redis.call('ZREM', seen, ARGV[1])
else
  redis.call('HSET', workers, ARGV[1], ARGV[2])
  redis.call('ZADD', seen, now_ms, ARGV[1])
end
for _, owner in ipairs(redis.call('ZRANGEBYSCORE', seen, '-inf', now_ms - tonumber(ARGV[3]), 'LIMIT', 0, 100)) do
  redis.call('HDEL', workers, owner)
  redis.call('ZREM', seen, owner)
end
return 1
