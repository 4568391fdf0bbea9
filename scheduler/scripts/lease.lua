-- Take tasks: expired leases come back first, due retries next, then the lanes, live before bulk and bulk first in every ninth turn.
-- KEYS[1]  prefix of the namespace
-- ARGV     owner, lease in ms, how many at most
-- reply    a list of {id, payload, epoch, deliveries, attempts}
-- The epoch grows with every lease and survives a Redis that lost its last seconds (microseconds of its clock), so an
-- earlier holder can never pass for the present one.
local prefix, owner, lease_ms, wanted = KEYS[1], ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local time = redis.call('TIME')
local now_ms = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local meta, leased, delayed = prefix .. ':meta', prefix .. ':leased', prefix .. ':delayed'

local function back(from)
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', from, '-inf', now_ms, 'LIMIT', 0, 100)) do
    redis.call('ZREM', from, id)
    local task = redis.call('HMGET', prefix .. ':task:' .. id, 'lane', 'position')
    if task[1] then
      redis.call('ZADD', prefix .. ':ready:' .. task[1], task[2], id)
    end
  end
end
back(leased)
back(delayed)

local function next_id()
  local turn = redis.call('HINCRBY', meta, 'turn', 1)
  local order = (turn % 9 == 0) and { 'bulk', 'live' } or { 'live', 'bulk' }
  for _, lane in ipairs(order) do
    local popped = redis.call('ZPOPMIN', prefix .. ':ready:' .. lane)
    if popped[1] then
      return popped[1]
    end
  end
  return nil
end

local leases = {}
for _ = 1, wanted do
  local id = next_id()
  if not id then
    break
  end
  local key = prefix .. ':task:' .. id
  local payload = redis.call('HGET', key, 'payload')
  if payload then
    local last = tonumber(redis.call('HGET', meta, 'epoch') or '0')
    local epoch = string.format('%.0f', math.max(last + 1, tonumber(time[1]) * 1000000 + tonumber(time[2])))
    redis.call('HSET', meta, 'epoch', epoch)
    redis.call('HSET', key, 'epoch', epoch, 'owner', owner)
    local deliveries = redis.call('HINCRBY', key, 'deliveries', 1)
    redis.call('ZADD', leased, now_ms + lease_ms, id)
    leases[#leases + 1] = { id, payload, epoch, deliveries, tonumber(redis.call('HGET', key, 'attempts')) }
  end
end
return leases
