-- Shared by the scripts that enqueue; needs turns.lua before it.
-- Tasks of one job, from ARGV[first]: job, dataset URL, lane, fingerprint, count, then id, payload, cost and rows of each.
-- How many were added, and the position behind them in ARGV; a task that is already known is left as it is.
local function add_tasks(first)
  local job, lane, fingerprint, count = ARGV[first], ARGV[first + 2], ARGV[first + 3], tonumber(ARGV[first + 4])
  local before = redis.call('HMGET', job_key(job), 'lane', 'fingerprint')
  if before[1] ~= lane or before[2] ~= fingerprint then
    leave_turns(job)
  end
  redis.call('SADD', prefix .. ':jobs', job)
  redis.call('SADD', prefix .. ':pools', fingerprint)
  redis.call('HSET', job_key(job), 'dataset', ARGV[first + 1], 'lane', lane, 'fingerprint', fingerprint, 'touched', now_ms)
  local added = 0
  for i = first + 5, first + 4 + 4 * count, 4 do
    local id, cost, rows = ARGV[i], tonumber(ARGV[i + 2]), tonumber(ARGV[i + 3])
    if redis.call('EXISTS', task_key(id)) == 0 then
      local position = redis.call('HINCRBY', meta, 'position', 1)
      redis.call('HSET', task_key(id), 'payload', ARGV[i + 1], 'job', job, 'position', position, 'epoch', '0',
        'deliveries', 0, 'attempts', 0, 'cost', cost, 'rows', rows, 'since', now_ms)
      redis.call('ZADD', ready_key(job), position, id)
      redis.call('HINCRBY', job_key(job), 'rows', rows)
      redis.call('HINCRBY', job_key(job), 'tokens', cost)
      added = added + 1
    end
  end
  join_turns(job)
  if added > 0 then
    wake(added)
  end
  return added, first + 5 + 4 * count
end
