-- Forget everything of a namespace that nobody else uses.
-- include: turns
-- KEYS[1]  prefix of the namespace
-- reply    how many tasks were forgotten
local forgotten = 0
for _, place in ipairs({ leased, delayed }) do
  for _, id in ipairs(redis.call('ZRANGE', place, 0, -1)) do
    forgotten = forgotten + redis.call('DEL', task_key(id))
  end
end
for _, job in ipairs(redis.call('SMEMBERS', prefix .. ':jobs')) do
  for _, id in ipairs(redis.call('ZRANGE', ready_key(job), 0, -1)) do
    forgotten = forgotten + redis.call('DEL', task_key(id))
  end
  leave_turns(job)
  redis.call('DEL', ready_key(job), job_key(job), prefix .. ':dead:' .. job)
end
redis.call('DEL', leased, delayed, meta, prefix .. ':jobs', prefix .. ':pools', prefix .. ':wake', prefix .. ':announced',
  prefix .. ':workers', prefix .. ':seen')
return forgotten
