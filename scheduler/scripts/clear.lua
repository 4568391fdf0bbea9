-- Forget everything of a namespace that nobody else uses.
-- KEYS[1]  prefix of the namespace
-- reply    how many tasks were forgotten
local prefix = KEYS[1]
local forgotten = 0
for _, place in ipairs({ ':ready:live', ':ready:bulk', ':leased', ':delayed' }) do
  for _, id in ipairs(redis.call('ZRANGE', prefix .. place, 0, -1)) do
    forgotten = forgotten + redis.call('DEL', prefix .. ':task:' .. id)
  end
  redis.call('DEL', prefix .. place)
end
redis.call('DEL', prefix .. ':meta', prefix .. ':wake', prefix .. ':announced', prefix .. ':dead')
return forgotten
