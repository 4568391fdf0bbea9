-- Says that the holders of permits are alive.
-- KEYS[1] holders  zset  op -> when its permit is taken back, ms of this server's clock
-- ARGV    holder_ttl in ms, then the ops
-- Reply: how many of them still hold their permit
local time = redis.call('TIME')
local until_ms = tonumber(time[1]) * 1000 + tonumber(time[2]) / 1000 + tonumber(ARGV[1])
local kept = 0
-- A full server, too, takes what is written behind a first write that needs no memory.
redis.call('ZREM', KEYS[1], '')
for i = 2, #ARGV do
  local score = redis.call('ZSCORE', KEYS[1], ARGV[i])
  if score then
    kept = kept + 1
    if tonumber(score) < until_ms then
      redis.call('ZADD', KEYS[1], string.format('%.3f', until_ms), ARGV[i])
    end
  end
end
return kept
