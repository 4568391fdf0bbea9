-- Shared by the scripts of the queue, which name it in an `-- include` line: whose turn it is, and where a task is.
--
--   task:ID            hash   payload, job, position, epoch, owner, deliveries, attempts, cost, rows, since
--   job:JOB            hash   dataset, lane, fingerprint, served, paused, rows, tokens, touched; JOB is DATASET-ID:NAME
--   jobs, pools        set    of all JOBs; of all fingerprints
--   ready:JOB          zset   ids by position: the order of admission, kept by whatever comes back
--   turns:LANE:FINGERPRINT  zset  jobs with ready tasks, by the tokens that they were served (start-time fair queueing)
--   leased, delayed    zset   ids by the ms of Redis' clock when the lease ends, or the delay
--   meta               hash   position, epoch; longest_lease and longest_delay that were ever given, ms; per pool, which is an
--                             embedder's fingerprint: `turn:`, `bulk_served:` (ms), `clock:LANE:`, how far its turns have come
local prefix = KEYS[1]
local time = redis.call('TIME')
local now_ms = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local meta, leased, delayed = prefix .. ':meta', prefix .. ':leased', prefix .. ':delayed'

local function task_key(id) return prefix .. ':task:' .. id end
local function job_key(job) return prefix .. ':job:' .. job end
local function ready_key(job) return prefix .. ':ready:' .. job end
local function turns_key(lane, fingerprint) return prefix .. ':turns:' .. lane .. ':' .. fingerprint end
local function clock(lane, fingerprint) return 'clock:' .. lane .. ':' .. fingerprint end

-- For scripts that take work or memory away: a full server, too, takes whatever a script writes behind a first write that
-- needs no memory.
local function also_when_full() redis.call('HDEL', meta, '') end

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

local LONGEST = { [leased] = 'longest_lease', [delayed] = 'longest_delay' }

-- Keep a task in `leased` or `delayed` for so long.
local function hold(place, id, ms)
  if ms > tonumber(redis.call('HGET', meta, LONGEST[place]) or '0') then
    redis.call('HSET', meta, LONGEST[place], ms)
  end
  redis.call('ZADD', place, now_ms + ms, id)
end

-- What is due returns to its job. Nothing was given for longer than the longest time: what seems to end later is from before
-- the clock was set back, and is held for that time from now on.
local function back(from)
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', from, '-inf', now_ms, 'LIMIT', 0, 100)) do
    redis.call('ZREM', from, id)
    make_ready(id)
  end
  local longest = redis.call('HGET', meta, LONGEST[from])
  if longest then
    local latest = now_ms + tonumber(longest)
    for _, id in ipairs(redis.call('ZRANGEBYSCORE', from, '(' .. latest, '+inf', 'LIMIT', 0, 100)) do
      redis.call('ZADD', from, latest, id)
    end
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
