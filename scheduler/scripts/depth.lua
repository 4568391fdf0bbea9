-- How much is where.
-- include: turns
-- KEYS[1]  prefix of the namespace
-- reply    ready live, ready bulk, leased, delayed, dead letters
local ready, dead = { live = 0, bulk = 0 }, 0
for _, job in ipairs(redis.call('SMEMBERS', prefix .. ':jobs')) do
  local lane = redis.call('HGET', job_key(job), 'lane')
  if lane then
    ready[lane] = ready[lane] + redis.call('ZCARD', ready_key(job))
  end
  dead = dead + redis.call('HLEN', prefix .. ':dead:' .. job)
end
return { ready.live, ready.bulk, redis.call('ZCARD', leased), redis.call('ZCARD', delayed), dead }
