-- Remove a job: its tasks wherever they are, its dead letters and its record.
-- include: turns
-- KEYS[1]  prefix of the namespace
-- ARGV     job, ms for which it must have been without a task (0: whatever it has)
-- reply    how many tasks were removed, or -1 when it is not idle for that long
local job, idle_ms = ARGV[1], tonumber(ARGV[2])
if idle_ms > 0 then
  local known = redis.call('HMGET', job_key(job), 'rows', 'touched')
  if tonumber(known[1] or '0') > 0 or now_ms - tonumber(known[2] or '0') < idle_ms then
    return -1
  end
end
local removed = 0
for _, id in ipairs(redis.call('ZRANGE', ready_key(job), 0, -1)) do
  remove(id)
  removed = removed + 1
end
for _, place in ipairs({ leased, delayed }) do
  for _, id in ipairs(redis.call('ZRANGE', place, 0, -1)) do
    if redis.call('HGET', task_key(id), 'job') == job then
      remove(id)
      removed = removed + 1
    end
  end
end
redis.call('DEL', job_key(job), prefix .. ':dead:' .. job)
redis.call('SREM', prefix .. ':jobs', job)
return removed
