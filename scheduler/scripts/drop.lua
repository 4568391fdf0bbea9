-- Forget a leased task.
-- include: turns
-- KEYS[1]  prefix of the namespace
-- ARGV     id, epoch
-- reply    1, or 0 when the lease is lost
if redis.call('HGET', task_key(ARGV[1]), 'epoch') ~= ARGV[2] or not redis.call('ZSCORE', leased, ARGV[1]) then
  return 0
end
remove(ARGV[1])
return 1
