-- Stop or go on handing out the tasks of a job. What is leased stays leased: its holders are told when they extend.
-- include: turns
-- KEYS[1]  prefix of the namespace
-- ARGV     job, 1 to pause or 0 to resume
-- reply    1 when that changed anything
local job = ARGV[1]
also_when_full()
local before = redis.call('HGET', job_key(job), 'paused') or '0'
redis.call('SADD', prefix .. ':jobs', job)
redis.call('HSET', job_key(job), 'paused', ARGV[2], 'touched', now_ms)
if ARGV[2] == '1' then
  leave_turns(job)
else
  join_turns(job)
  wake(1)
end
return before == ARGV[2] and 0 or 1
