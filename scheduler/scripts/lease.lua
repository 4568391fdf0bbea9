-- Take tasks. Expired leases come back first, then retries that are due. Live goes before bulk, but for every ninth turn of
-- the embedder and whenever its bulk was not served for a while; within a lane the job that was served the fewest tokens is next.
-- include: turns
-- KEYS[1]  prefix of the namespace
-- ARGV     owner, lease in ms, how many at most, fingerprint of the embedder (empty: any), patience of bulk in ms
-- reply    a list of {id, payload, epoch, deliveries, attempts}
-- The epoch grows with every lease and survives a Redis that lost its last seconds (microseconds of its clock), so an
-- earlier holder can never pass for the present one.
local owner, lease_ms, wanted, mine = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4]
local patience_ms = tonumber(ARGV[5])
local turn_of_pool, bulk_served = 'turn:' .. mine, 'bulk_served:' .. mine

also_when_full()
back(leased)
back(delayed)
redis.call('HSETNX', meta, bulk_served, now_ms)

local pools = { mine }
if mine == '' then
  pools = redis.call('SMEMBERS', prefix .. ':pools')
end

-- The job whose turn it is in a lane, the pool that it is in, and what it was served.
local function next_job(lane)
  local job, pool, served
  for _, fingerprint in ipairs(pools) do
    local head = redis.call('ZRANGE', turns_key(lane, fingerprint), 0, 0, 'WITHSCORES')
    if head[1] and (not job or tonumber(head[2]) < served) then
      job, pool, served = head[1], fingerprint, tonumber(head[2])
    end
  end
  return job, pool, served
end

local function next_id()
  local turn = tonumber(redis.call('HGET', meta, turn_of_pool) or '0') + 1
  local waited_ms = now_ms - tonumber(redis.call('HGET', meta, bulk_served))
  local bulk_waits = waited_ms >= patience_ms or waited_ms < 0
  local order = (turn % 9 == 0 or bulk_waits) and { 'bulk', 'live' } or { 'live', 'bulk' }
  for _, lane in ipairs(order) do
    local job, pool, served = next_job(lane)
    if job then
      local id = redis.call('ZPOPMIN', ready_key(job))[1]
      served = served + tonumber(redis.call('HGET', task_key(id), 'cost') or '0')
      redis.call('HSET', job_key(job), 'served', string.format('%.0f', served))
      redis.call('HSET', meta, turn_of_pool, turn, clock(lane, pool), redis.call('ZSCORE', turns_key(lane, pool), job))
      if lane == 'bulk' then
        redis.call('HSET', meta, bulk_served, now_ms)
      end
      if redis.call('ZCARD', ready_key(job)) == 0 then
        redis.call('ZREM', turns_key(lane, pool), job)
      else
        redis.call('ZADD', turns_key(lane, pool), served, job)
      end
      return id
    end
  end
  return nil
end

local leases = {}
while #leases < wanted do
  local id = next_id()
  if not id then
    break
  end
  local task = redis.call('HMGET', task_key(id), 'payload', 'attempts')
  if task[1] then
    local last = tonumber(redis.call('HGET', meta, 'epoch') or '0')
    local epoch = string.format('%.0f', math.max(last + 1, tonumber(time[1]) * 1000000 + tonumber(time[2])))
    redis.call('HSET', meta, 'epoch', epoch)
    redis.call('HSET', task_key(id), 'epoch', epoch, 'owner', owner)
    local deliveries = redis.call('HINCRBY', task_key(id), 'deliveries', 1)
    hold(leased, id, lease_ms)
    leases[#leases + 1] = { id, task[1], epoch, deliveries, tonumber(task[2]) }
  end
end
return leases
