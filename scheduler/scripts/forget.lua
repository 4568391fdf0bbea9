-- Remove a job: its tasks wherever they are, its dead letters and its record; a block at each call. From the first one on the job
-- is paused, so that its tasks only move on in the order in which the places are looked through: leased, delayed, ready.
-- include: turns
-- KEYS[1]  prefix of the namespace
-- ARGV     job, ms for which it must have been without a task (0: whatever it has), then where to go on: a place (at first leased,
--          or ready for a job without tasks) and a cursor (at first 0)
-- reply    how many tasks were removed, or -1 when it is not idle for that long; where to go on, with an empty place at the end
local BLOCK = 500
local job, idle_ms, place, cursor = ARGV[1], tonumber(ARGV[2]), ARGV[3], ARGV[4]
if idle_ms > 0 then
  local known = redis.call('HMGET', job_key(job), 'rows', 'touched')
  if tonumber(known[1] or '0') > 0 or now_ms - tonumber(known[2] or '0') < idle_ms then
    return { -1, '', '0' }
  end
end
also_when_full()
leave_turns(job)
if redis.call('EXISTS', job_key(job)) == 1 then
  redis.call('HSET', job_key(job), 'paused', '1')
end

local removed = 0
if place == 'ready' then
  local popped = redis.call('ZPOPMIN', ready_key(job), BLOCK)
  for i = 1, #popped, 2 do
    if remove(popped[i]) then
      removed = removed + 1
    end
  end
  if #popped == 2 * BLOCK then
    return { removed, place, '0' }
  end
  redis.call('UNLINK', job_key(job), prefix .. ':dead:' .. job)
  redis.call('SREM', prefix .. ':jobs', job)
  return { removed, '', '0' }
end
local page = redis.call('ZSCAN', prefix .. ':' .. place, cursor, 'COUNT', BLOCK)
for i = 1, #page[2], 2 do
  if redis.call('HGET', task_key(page[2][i]), 'job') == job then
    remove(page[2][i])
    removed = removed + 1
  end
end
if removed > 0 then
  return { removed, place, cursor }
elseif page[1] ~= '0' then
  return { 0, place, page[1] }
end
return { 0, place == 'leased' and 'delayed' or 'ready', '0' }
