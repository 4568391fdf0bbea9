-- What every job has in the queue.
-- include: turns
-- KEYS[1]  prefix of the namespace
-- reply    per job: job, dataset, lane, fingerprint, paused, ready, leased, delayed, rows, tokens, age in ms of the oldest
--          ready task, dead letters
local places = {}
for index, place in ipairs({ leased, delayed }) do
  for _, id in ipairs(redis.call('ZRANGE', place, 0, -1)) do
    local job = redis.call('HGET', task_key(id), 'job')
    if job then
      places[job] = places[job] or { 0, 0 }
      places[job][index] = places[job][index] + 1
    end
  end
end
local found = {}
for _, job in ipairs(redis.call('SMEMBERS', prefix .. ':jobs')) do
  local known = redis.call('HMGET', job_key(job), 'dataset', 'lane', 'fingerprint', 'paused', 'rows', 'tokens')
  local oldest = redis.call('ZRANGE', ready_key(job), 0, 0)[1]
  local age = 0
  if oldest then
    age = math.max(0, now_ms - tonumber(redis.call('HGET', task_key(oldest), 'since')))
  end
  local busy = places[job] or { 0, 0 }
  found[#found + 1] = { job, known[1] or '', known[2] or '', known[3] or '', known[4] or '0',
    redis.call('ZCARD', ready_key(job)), busy[1], busy[2], known[5] or '0', known[6] or '0', age,
    redis.call('HLEN', prefix .. ':dead:' .. job) }
end
return found
