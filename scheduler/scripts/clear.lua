-- Forget everything of a namespace that nobody else uses; a block at each call.
-- include: turns
-- KEYS[1]  prefix of the namespace
-- reply    how many tasks were forgotten; 1 when there is more, else 0
local left, forgotten = 2000, 0

local function drain(place)
  if left > 0 then
    local popped = redis.call('ZPOPMIN', place, left)
    for i = 1, #popped, 2 do
      forgotten = forgotten + redis.call('DEL', task_key(popped[i]))
      left = left - 1
    end
  end
end

drain(leased)
drain(delayed)
for _, job in ipairs(redis.call('SMEMBERS', prefix .. ':jobs')) do
  leave_turns(job)
  drain(ready_key(job))
  if left <= 0 then
    return { forgotten, 1 }
  end
  left = left - 1
  redis.call('UNLINK', job_key(job), prefix .. ':dead:' .. job)
  redis.call('SREM', prefix .. ':jobs', job)
end
redis.call('UNLINK', meta, prefix .. ':pools', prefix .. ':wake', prefix .. ':announced', prefix .. ':workers', prefix .. ':seen')
return { forgotten, 0 }
