-- Shared by the scripts of the queue, which name it in an `-- include` line: whose turn it is, and where a task is.
--
--   task:ID            hash   payload, job, position, epoch, owner, deliveries, attempts, cost, rows, since
--   job:JOB            hash   dataset, lane, fingerprint, served, paused, rows, tokens, touched; JOB is DATASET-ID:NAME
--   jobs, pools        set    of all JOBs; of all fingerprints
--   ready:JOB          zset   ids by position: the order of admission, kept by whatever comes back
--   turns:LANE:FINGERPRINT  zset  jobs with ready tasks, by the tokens that they were served (start-time fair queueing)
--   leased, delayed    zset   ids by the ms of Redis' clock when the lease ends, or the delay
--   meta               hash   counters: position, epoch, turn, and `clock:...`, how far the turns of a pool have come
local prefix = KEYS[1]
local time = redis.call('TIME')
local now_ms = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local meta, leased, delayed = prefix .. ':meta', prefix .. ':leased', prefix .. ':delayed'

local function task_key(id) return prefix .. ':task:' .. id end
local function job_key(job) return prefix .. ':job:' .. job end
local function ready_key(job) return prefix .. ':ready:' .. job end
local function turns_key(lane, fingerprint) return prefix .. ':turns:' .. lane .. ':' .. fingerprint end
local function clock(lane, fingerprint) return 'clock:' .. lane .. ':' .. fingerprint end

-- A job that has ready tasks and is not paused takes part in the turns; nobody saves up turns while idle.
local function join_turns(job)
  local known = redis.call('HMGET', job_key(job), 'lane', 'fingerprint', 'served', 'paused')
  if not known[1] or known[4] == '1' or redis.call('ZCARD', ready_key(job)) == 0 then
    return
  end
  local turns = turns_key(known[1], known[2])
  if not redis.call('ZSCORE', turns, job) then
    local now = tonumber(redis.call('HGET', meta, clock(known[1], known[2])) or '0')
    redis.call('ZADD', turns, math.max(tonumber(known[3] or '0'), now), job)
  end
end

local function leave_turns(job)
  local known = redis.call('HMGET', job_key(job), 'lane', 'fingerprint')
  if known[1] then
    redis.call('ZREM', turns_key(known[1], known[2]), job)
  end
end

local function make_ready(id)
  local task = redis.call('HMGET', task_key(id), 'job', 'position')
  if task[1] then
    redis.call('ZADD', ready_key(task[1]), task[2], id)
    join_turns(task[1])
  end
end

-- Forget a task, wherever it is; its job, or nil when it was not known.
local function remove(id)
  local task = redis.call('HMGET', task_key(id), 'job', 'rows', 'cost')
  if not task[1] then
    return nil
  end
  redis.call('DEL', task_key(id))
  redis.call('ZREM', leased, id)
  redis.call('ZREM', delayed, id)
  if redis.call('ZREM', ready_key(task[1]), id) == 1 and redis.call('ZCARD', ready_key(task[1])) == 0 then
    leave_turns(task[1])
  end
  redis.call('HINCRBY', job_key(task[1]), 'rows', -tonumber(task[2]))
  redis.call('HINCRBY', job_key(task[1]), 'tokens', -tonumber(task[3]))
  redis.call('HSET', job_key(task[1]), 'touched', now_ms)
  return task[1]
end

local function wake(count)
  redis.call('XADD', prefix .. ':wake', 'MAXLEN', '~', 16, '*', 'added', count)
end
