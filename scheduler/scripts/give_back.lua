-- Hand a leased task back, now or later. At once is as if it had never been taken; one that waits has used its job's turn, or a
-- job in trouble would be first at every turn.
-- include: turns
-- KEYS[1]  prefix of the namespace
-- ARGV     id, epoch, delay in ms (0: at once), failed (1 counts an attempt; 0 is a hand-back that counts nothing)
-- reply    1, or 0 when the lease is lost
local id, epoch, delay_ms, failed = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4]
local key = task_key(id)
also_when_full()
if redis.call('HGET', key, 'epoch') ~= epoch or redis.call('ZREM', leased, id) == 0 then
  return 0
end

-- What its job was charged for it. A job that joined the turns later than that was lifted over the charge.
local function refund()
  local task = redis.call('HMGET', key, 'job', 'cost')
  local known = redis.call('HMGET', job_key(task[1]), 'lane', 'fingerprint', 'served')
  if known[3] then
    redis.call('HINCRBY', job_key(task[1]), 'served', -tonumber(task[2]))
    local turns = turns_key(known[1], known[2])
    if tonumber(redis.call('ZSCORE', turns, task[1])) == tonumber(known[3]) then
      redis.call('ZINCRBY', turns, -tonumber(task[2]), task[1])
    end
  end
end

redis.call('HSET', key, 'deliveries', math.max(0, tonumber(redis.call('HGET', key, 'deliveries')) - 1))
if failed == '1' then
  redis.call('HINCRBY', key, 'attempts', 1)
end
if delay_ms > 0 then
  hold(delayed, id, delay_ms)
else
  refund()
  make_ready(id)
  wake(1)
end
return 1
