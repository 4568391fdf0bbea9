-- Keep leases alive.
-- KEYS[1]  prefix of the namespace
-- ARGV     lease in ms, then id, epoch and progress (1 when the checkpoint grew) of each lease
-- reply    ids of the leases that are lost: taken by somebody else, or finished
local prefix, lease_ms = KEYS[1], tonumber(ARGV[1])
local time = redis.call('TIME')
local until_ms = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000) + lease_ms
local lost = {}
for i = 2, #ARGV, 3 do
  local key = prefix .. ':task:' .. ARGV[i]
  if redis.call('HGET', key, 'epoch') == ARGV[i + 1] and redis.call('ZSCORE', prefix .. ':leased', ARGV[i]) then
    redis.call('ZADD', prefix .. ':leased', until_ms, ARGV[i])
    if ARGV[i + 2] == '1' then
      redis.call('HSET', key, 'deliveries', 0)
    end
  else
    lost[#lost + 1] = ARGV[i]
  end
end
return lost
