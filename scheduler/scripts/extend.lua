-- Keep leases alive. What others let expire comes back here, too: a worker that is full takes no tasks.
-- include: turns
-- KEYS[1]  prefix of the namespace
-- ARGV     lease in ms, then id, epoch and progress (1 when the checkpoint grew) of each lease
-- reply    ids of the leases that are lost (taken by somebody else, finished or forgotten), ids of those whose job is paused
local lease_ms = tonumber(ARGV[1])
also_when_full()
local lost, halted = {}, {}
for i = 2, #ARGV, 3 do
  local id = ARGV[i]
  local task = redis.call('HMGET', task_key(id), 'epoch', 'job')
  if task[1] == ARGV[i + 1] and redis.call('ZSCORE', leased, id) then
    hold(leased, id, lease_ms)
    if ARGV[i + 2] == '1' then
      redis.call('HSET', task_key(id), 'deliveries', 0)
    end
    if redis.call('HGET', job_key(task[2]), 'paused') == '1' then
      halted[#halted + 1] = id
    end
  else
    lost[#lost + 1] = id
  end
end
back(leased)
back(delayed)
return { lost, halted }
